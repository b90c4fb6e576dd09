"""Whether this machine is fit for the loss: what it has, which path a call takes, parity and times.

examine.py: all of it · devices.py: torch, triton, the device · limits.py: cores, memory, disk · self_check.py: the loss
against the specification · findings.py: how it is said. Nothing here is imported before torch has been tried.
"""
