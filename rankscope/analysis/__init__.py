"""What stores of updates are made of, as frozen results with a versioned JSON form."""
