"""Foundation of all other packages: records, their files, errors. No torch."""
