"""Structure search: from importance scores and a budget to a plan of what stays."""
