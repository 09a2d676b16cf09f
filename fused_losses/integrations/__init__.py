"""This package connects the losses to other libraries.

The rest of fused_losses imports none of its modules, except trl_functions, whose functions it exports.
"""
