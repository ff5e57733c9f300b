"""Networks and recipes built with dstlib; the core never imports them."""
