"""The lecture's nets, trained: recipes, the loop, what is measured, and the names a net invents.

`python -m train` writes `ckpt.pt`. The package runs from the checkout and is no part of the wheel; what it leaves
behind is a checkpoint that `bnfold.checkpoint` alone can read.
"""
