"""From a model to text: which token comes next, the loop over tokens, and the text they spell."""
