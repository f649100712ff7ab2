"""MEASURED: real training steps in a worker of their own, their records, and the search over them.

sizes     8GB, 8GiB, 25%
device    which device, how much memory it has
step      problem -> workload: module, graph, loss, optimizer, batch; one training step
meter     exact bytes of live tensors, the allocator's peak
reference where the plain network can run once, to be compared with
verify    gradients of a plan against the plain network
measure   verify, time and meter one plan
worker    the process that measures; supervisor: its parent's side
knobs     what a search turns; space: the plan that follows
records   what was measured, appended to a file
task      what a search is given, says and returns
shared    one study of several processes and machines; helpers, helper: those of this machine
trials    the Optuna study itself
telling   why something is measured, and how long the rest may take
study     Optuna over the plan's knobs; finals: its fastest plans in turns; infeasible: why nothing fits
front     points of the front that were predicted; inherit: what another search measured
find      workload + budget -> plan file; foresee: the same from prediction alone
output    may it be written, and where else when the disk is full
"""
