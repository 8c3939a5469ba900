"""The layers around the attention, where a framework's own are slow enough to hide what the attention kernels gain."""
