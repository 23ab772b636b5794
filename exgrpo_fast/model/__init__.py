"""The model, from packed sequences up to its hidden states and head.

policy          body and head, passes over packs, scores     model_folder   what a folder of weights is
packing         sequences side by side, no padding           attention      who sees whom in a pack
lora            adapters      quantization   frozen weights in 4 bits
tiling          MLPs and norms over tiles of tokens          head_gradient  summed where it is wanted
out_of_memory   the same passes in smaller pieces
"""
