"""The formats in which the makers published their models: each is a table of names, read and written."""
