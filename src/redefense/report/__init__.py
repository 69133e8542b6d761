"""Tables, sentences, charts and pages about stored evaluations."""
