"""The tuner: which schedules there are, which of them can be good, which of them is, and how an op finds it again.

sweep, folder, log     what is tuned, the directory that its stages exchange, and its append-only log
space, gpus, model     the schedules of a kernel family, facts about GPUs, a lower bound of a schedule's time
tiles, cycles          what the model reads off tile IR: memory, registers, traffic, the chain of a block's work
plan, search           the candidates that are worth a compiler, and in which order they are tried
compile, climb         machine code, and what can be told of it without a GPU; what is kept of it (compiled)
measure, finals        candidates on devices: right first, then timed, then in turn with the best and the default
bench, pool, worker    a process a device, asked by a thread; what was measured already (measured)
devices, check, timing what a worker does on a GPU, on the CPU, or on a recording
cases, expected        what is checked, what the oracle makes of it; in memory with guards (guarded)
launches               built kernels as calls, for devices and for benchmarks
distribute             compiling and measuring over a Ray cluster
publish, tables, select  winners as tables, and the choice among them for a call, which never measures
choose, variants       the same with the compiler at hand: the model where no table speaks; what a build compiles
defaults               the schedule where nothing was tuned
report, why            what happened, for people
"""
