"""Dense layers on a CPU by the fastest way known for the dtype and the number of rows, as custom operators.

    monoblock::linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor
        x (..., in), weight (out, in), both float32 or both bfloat16; gives (..., out) in x's dtype.
    monoblock::packed_linear(Tensor x, Tensor codes, Tensor scale, Tensor? low, Tensor? bias,
                             int bits, int group, int in_features) -> Tensor
        x (..., in_features) float32 or bfloat16; codes uint8 (out, padded) for 8 bits, (out, padded / 2) for 4; scale,
        and low for 4 bits, float16 (out, padded / group); bias in float32 or bfloat16. Gradients reach x alone.

`padded` is in_features up to the next multiple of 128. The layout of codes is explained in native/matrix.hpp.
"""
