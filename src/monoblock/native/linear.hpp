// `linear`: y = x W^T + bias for inputs and outputs in float32 or bf16, any number of rows, on several threads. It chooses
// between the tiles for few rows and the GEMMs for many. Part of matrix.hpp.
#pragma once

namespace matrices {

constexpr int BATCH_ROWS = 16;  // rows of inputs that are prepared together; more rows go to a GEMM
constexpr int STRIP = 512;      // outputs that a thread holds as floats before it rounds them to bf16
constexpr int CHUNK = 512;      // outputs of one iteration of the parallel loop; fewer for small matrices
constexpr int64_t SERIAL_WORK = 1 << 16;  // multiplications below which waking other threads takes longer than the work

// A buffer per calling thread, reused by later calls and grown when needed, so that a call rarely allocates. Null if the
// allocation fails.
inline void* scratch_of(int64_t bytes) {
  static thread_local void* buffer = nullptr;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    free(buffer);
    size = round_up(bytes, 1 << 16);
    buffer = malloc(size);
    if (!buffer) size = 0;
  }
  return buffer;
}

// Outputs [first, last) of up to BATCH_ROWS rows; bf16 results are rounded once, from float sums.
inline void outputs_of(const Matrix& m, const Prepared& p, int rows, void* y, int32_t y_format, int64_t ldy,
                       int64_t first, int64_t last) {
  if (y_format == F32) return multiply(m, p, rows, (float*)y, ldy, first, last);
  float strip[BATCH_ROWS * STRIP];
  uint16_t* to = (uint16_t*)y;
  for (; first < last; first += STRIP) {
    int64_t end = first + STRIP < last ? first + STRIP : last;
    multiply(m, p, rows, strip - first, STRIP, first, end);
    for (int row = 0; row < rows; ++row)
      for (int64_t o = first; o < end; ++o) to[row * ldy + o] = to_bf16(strip[row * STRIP + o - first]);
  }
}

#if defined(MB_INT8_DOT)
constexpr int64_t BATCH = 1024;  // rows of inputs that are quantised at once: it bounds the scratch

// `linear` for INT8 and INT4 weights and many rows.
inline int gemm_int8(const Matrix& m, const void* x, int32_t x_format, int64_t ldx, int64_t rows, void* y,
                           int32_t y_format, int64_t ldy, int threads) {
  const int64_t most = rows < BATCH ? rows : BATCH, inputs = round_up(prepared_bytes(m.inputs, most), 64);
  const int64_t own = round_up(PackedPanel::bytes(m.inputs, m.group) + m.inputs * 4, 64);  // bytes per thread
  char* scratch = (char*)scratch_of(inputs + threads * own);
  if (!scratch) return 1;
  Prepared p = prepared_in(scratch, m.inputs, most);
  for (int64_t start = 0; start < rows; start += most) {
    const int64_t count = rows - start < most ? rows - start : most;
    const char* from = (const char*)x + start * ldx * (x_format == BF16 ? 2 : 4);
    char* to = (char*)y + start * ldy * (y_format == BF16 ? 2 : 4);
    parallel::region(threads, [&](parallel::Region& region) {
      char* mine = scratch + inputs + region.thread() * own;
      const PackedPanel packed(mine, m);
      float* wide = (float*)(mine + own - m.inputs * 4);
      region.loop(count, 8, [&](int64_t row) {
        const float* floats = (const float*)from + row * ldx;
        if (x_format == BF16) convert_to_float((const uint16_t*)from + row * ldx, m.inputs, wide), floats = wide;
        quantise_row(floats, row, m, p);
      });
      region.loop((m.outputs + PANEL - 1) / PANEL, 1, [&](int64_t panel) {
        int8_panel(m, packed, panel * PANEL, p, count, to, y_format, ldy, row_prefetch(m, (panel + threads) * PANEL, PANEL));
      });
    });
  }
  return 0;
}
#endif

#if defined(MB_BF16_DOT)
// `linear` for BF16 and LOSSLESS weights and many rows of bf16 inputs.
inline int gemm_bf16(const Matrix& m, const uint16_t* x, int64_t ldx, int64_t rows, void* y, int32_t y_format,
                            int64_t ldy, int threads) {
  char* scratch = (char*)scratch_of(threads * PackedBlock::BYTES + 64);
  if (!scratch) return 1;
  scratch = (char*)round_up((int64_t)scratch, 64);
  parallel::region(threads, [&](parallel::Region& region) {
    const PackedBlock packed(scratch + region.thread() * PackedBlock::BYTES);
    region.loop((m.outputs + PANEL - 1) / PANEL, 1, [&](int64_t panel) {
      bf16_panel(m, packed, panel * PANEL, x, ldx, rows, (char*)y, y_format, ldy,
                 row_prefetch(m, (panel + threads) * PANEL, PANEL));
    });
  });
  return 0;
}
#endif

#if defined(__AMX_TILE__)
constexpr int64_t AMX_BATCH = 2048;  // rows of inputs that are converted at once: it bounds the scratch

// `linear` for weights of 16 bits and less; X, Y: float or uint16_t (bf16).
template <class X, class Y>
inline int gemm_amx(const Matrix& m, const X* x, int64_t ldx, int64_t rows, Y* y, int64_t ldy, int threads) {
  const int64_t most = rows < AMX_BATCH ? rows : AMX_BATCH, inputs = round_up(AmxInputs::bytes(m.inputs, most), 64);
  const int64_t own = round_up(AmxScratch::BYTES, 64);
  char* scratch = (char*)scratch_of(inputs + threads * own + 64);
  if (!scratch) return 1;
  scratch = (char*)round_up((int64_t)scratch, 64);
  for (int64_t start = 0; start < rows; start += most) {
    const int64_t count = rows - start < most ? rows - start : most, blocks = (count + SIDE - 1) / SIDE;
    const AmxTasks tasks(m, count, threads);
    AmxInputs in;
    in.place(scratch, m, count, true);
    parallel::region(threads, [&](parallel::Region& region) {
      const AmxScratch mine(scratch + inputs + region.thread() * own);
      region.loop(blocks, 2, [&](int64_t block) { in.prepare(m, x + start * ldx, ldx, count, block); });
      region.loop(tasks.count(), 1, [&](int64_t task) {
        const auto [row, end, first, last] = tasks.multiply(task, in, mine);
        amx_store(m, first, last - first, mine.sums, tasks.ld, end - row, y + (start + row) * ldy, ldy);
      });
    });
  }
  return 0;
}

template <class X>
inline int gemm_amx(const Matrix& m, const X* x, int64_t ldx, int64_t rows, void* y, int32_t y_format, int64_t ldy,
                    int threads) {
  return y_format == BF16 ? gemm_amx(m, x, ldx, rows, (uint16_t*)y, ldy, threads)
                          : gemm_amx(m, x, ldx, rows, (float*)y, ldy, threads);
}
#endif

// y (rows, outputs) = x (rows, inputs) W^T + bias; `ldx`, `ldy`: row strides in elements; formats F32 or BF16.
// Returns 0, or 1 if the scratch could not be allocated.
inline int linear(const Matrix& m, const void* x, int32_t x_format, int64_t ldx, int64_t rows, void* y,
                  int32_t y_format, int64_t ldy, int threads) {
  if (m.outputs * m.inputs * (rows < 4 ? 1 : rows / 4) < SERIAL_WORK) threads = 1;
#if defined(__AMX_TILE__)
  if (rows >= amx_rows(m))
    return x_format == BF16 ? gemm_amx(m, (const uint16_t*)x, ldx, rows, y, y_format, ldy, threads)
                            : gemm_amx(m, (const float*)x, ldx, rows, y, y_format, ldy, threads);
#endif
#if defined(MB_INT8_DOT)
  if (rows > BATCH_ROWS && (m.format == INT8 || m.format == INT4))
    return gemm_int8(m, x, x_format, ldx, rows, y, y_format, ldy, threads);
#endif
#if defined(MB_BF16_DOT)
  if (rows > BATCH_ROWS && (m.format == BF16 || m.format == LOSSLESS) && x_format == BF16 && m.inputs % 2 == 0)
    return gemm_bf16(m, (const uint16_t*)x, ldx, rows, y, y_format, ldy, threads);
#endif
  int64_t need = prepared_bytes(m.inputs, BATCH_ROWS), floats = BATCH_ROWS * m.inputs * 4;
  char* scratch = (char*)scratch_of(need + floats);
  if (!scratch) return 1;
  Prepared p = prepared_in(scratch, m.inputs, BATCH_ROWS);
  float* wide = (float*)(scratch + need);
  for (int64_t row = 0; row < rows; row += BATCH_ROWS) {
    int count = rows - row < BATCH_ROWS ? int(rows - row) : BATCH_ROWS;
    if (x_format == BF16) {
      for (int i = 0; i < count; ++i) convert_to_float((const uint16_t*)x + (row + i) * ldx, m.inputs, wide + i * m.inputs);
      prepare(m, wide, m.inputs, count, p);
    } else {
      prepare(m, (const float*)x + row * ldx, ldx, count, p);
    }
    void* to = (char*)y + row * ldy * (y_format == BF16 ? 2 : 4);
    const int64_t each = m.outputs < 8 * threads * CHUNK ? round_up(m.outputs / (8 * threads) + 1, 16) : CHUNK;
    const int64_t chunks = (m.outputs + each - 1) / each;
    parallel::dynamic_for(threads, chunks, [&](int64_t chunk) {
      const int64_t first = chunk * each, last = first + each < m.outputs ? first + each : m.outputs;
      outputs_of(m, p, count, to, y_format, ldy, first, last);
    });
  }
  return 0;
}

// y (rows, outputs) = x (rows, inputs) W^T + bias for up to BATCH_ROWS rows of float32, in the chunks of a decoding step.
// Returns as `linear`.
inline int product_by_plan(const Matrix& m, const float* x, int rows, float* y, int threads) {
  char* scratch = (char*)scratch_of(prepared_bytes(m.inputs, BATCH_ROWS));
  if (!scratch || rows > BATCH_ROWS) return 1;
  Prepared p = prepared_in(scratch, m.inputs, BATCH_ROWS);
  prepare(m, x, m.inputs, rows, p);
  const int64_t each = chunk_of(m, m.outputs, rows, threads), chunks = (m.outputs + each - 1) / each;
  parallel::dynamic_for(threads, chunks, [&](int64_t chunk) {
    const int64_t first = chunk * each, last = first + each < m.outputs ? first + each : m.outputs;
    multiply(m, p, rows, y, m.outputs, first, last);
  });
  return 0;
}

}  // namespace matrices
