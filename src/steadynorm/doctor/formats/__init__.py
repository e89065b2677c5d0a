"""A diagnosis in the formats that people and programs read; each is a function of the Diagnosis alone."""
