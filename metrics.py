"""stub"""
import numpy as np
def accuracy_without_ties(labels, margins):
    labels, margins = np.asarray(labels), np.asarray(margins)
    keep = labels != 0
    return float((np.sign(margins[keep]) == labels[keep]).mean())
