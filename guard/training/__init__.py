"""How the embedded model came to be: from labelled conversations to a calibrated checkpoint.

`data` reads a recipe and the rows it names, `base` the Llama that training starts from, `finetune` trains, `calibrate`
turns logits into probabilities, `evaluate` measures them, and `pipeline` puts these in a row: `train`, then `release`.
"""
