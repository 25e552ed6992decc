"""Records what a version of the package answers, and compares two recordings.

    python -m benchmarks.answers against main            # this tree beside a git ref, which is built for it
    python -m benchmarks.answers record OUT              # this tree; --package DIR: the package in another folder
    python -m benchmarks.answers compare BASE HERE       # exit status 1 where a case differs or is in one of them alone

Some ten thousand cases on models of four layers: every family, criterion, kind of layers, back-end and compaction,
losses and gradients of every training method, and files. Exit layers have to be equal; logits up to 1e-6, and in bits
where every sum has a fixed order: fused layers on the vector kernels, and replays. Both recordings must be of one
machine. Public names only are used, so that other versions run too.
"""
