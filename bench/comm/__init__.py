"""`python -m pysmooth.bench comm`: does compressed communication pay, on links of known speed?"""
