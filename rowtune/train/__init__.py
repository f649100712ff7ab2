"""TRAINED: a plan put to use, on one's own data.

options      what a run is told, and what it says and returns
opened       plan file -> workload, checked against the model as it is now
layout       what lies in a folder of images: classes, images and masks, or pairs
images       files -> tensors of the plan's sizes
folder       a folder as a dataset, checked against the loss
data         --data and --val -> batches, an epoch at a time, from any position
random_state random numbers: kept, put back, and drawn apart
schedule     the learning rate, a function of the step
metrics      accuracy, intersection over union, PSNR
validate     the planned module in eval(), batch by batch
learner      one optimizer step: accumulated, clipped, averaged, metered; a smaller plan where memory ran out
undo         what a step may change, kept so that it can be tried again
ranks        several processes that train one model: what they agree on
launch       torchrun's processes: from their environment to one line of what failed
sharded      --fsdp: weights in parts, whole where they are asked for
checkpoint   all that a run is, whole or not at all
log          what was seen, as lines of JSON and TensorBoard's events
weights      where the weights go: .safetensors, .pt, or back into the .onnx file
stop         Ctrl-C and SIGTERM end a run between two steps
setup        flags that go together, room on the disk, how many steps
loop         all of it: epochs, validation, checkpoints
"""
