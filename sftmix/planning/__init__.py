"""What a run would take, from its configuration alone: memory, traffic, work and time on named GPUs.

hardware.py: the GPUs · skeleton.py: the model without numbers · activations.py: what its blocks keep · memory.py: bytes
on a GPU by cause and phase · traffic.py: bytes between GPUs by cause · work.py: flops and seconds · plan.py: all of it,
and what would fit · report.py: the same in words · command.py: ``sftmix plan``
"""
