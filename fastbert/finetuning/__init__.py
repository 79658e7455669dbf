"""Fine-tuning on tables of texts and labels, and predictions of models with heads.

``table`` reads rows, ``tasks`` and ``tagging`` say what can be learned from them, ``finetune`` is a
run, ``predicting`` what a checkpoint says; ``report`` is what people are told.
"""
