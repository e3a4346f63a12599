"""How rows run through a backbone: packing, attention, dropout, chunking, recomputation."""
