"""Files of embeddings: the texts that are read, the resumable run that writes their vectors, and exact search.

No framework is imported: the model is a function from texts to an array.
"""
