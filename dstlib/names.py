"""What the methods are called, for what is read before they themselves, and torch with them, are loaded: options."""

METHOD_NAMES = (  # of dstlib.METHODS, in their order
    *("static", "set", "set_itop", "rigl", "rigl_itop", "gse", "seft", "snfs", "dsr", "mest", "mest_soft"),
    *("granet", "granet_sparse", "gmp", "gmp_global", "acdc", "cyclic"),
    *("srigl", "cht", "chts", "chtss", "topkast", "srste", "sste", "dsff"),
)
