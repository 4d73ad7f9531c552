"""Local paths and object-store addresses, atomic writes, range reads, scratch folders."""
