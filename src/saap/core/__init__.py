"""What every other package stands on: records, their files, errors. No torch."""
