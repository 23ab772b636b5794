"""The model, from packed sequences up to its hidden states and head.

policy          body and head, passes over packs, scores     folder_*, weight_files  what a folder says
packing         sequences side by side, no padding           attention/      who sees whom in a pack
sharded_policy  the same over several ranks                  agreement       which pass they are in
lora            adapters      frozen    linear layers in the compute dtype or in 4 bits
tiling          MLPs and norms over tiles of tokens          head_gradient   summed where it is wanted
oom             the same passes in smaller pieces            hf_folder       what a checkpoint writes
"""
