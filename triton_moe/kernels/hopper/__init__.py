"""The GEMMs in Gluon for compute capability 9.0: TMA, asynchronous matrix instructions, specialised warps."""
