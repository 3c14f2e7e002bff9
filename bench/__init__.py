"""The benchmark: step time of fusedstep, torch.optim and other optimizers on parameter lists of real models.

`suite` is the command, `arguments` its options, `measurement` how a row comes about, `models` the parameter lists,
`optimizers` what is measured on them, `peers` who takes part, `check` the correctness check that comes before any
timing, `timing` the clocks, `precision` what the precision options cost, `results` the file format, `plot` and `report`
what is drawn from such a file.
"""
