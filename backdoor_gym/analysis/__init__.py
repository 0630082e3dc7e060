"""What a policy sees of a network: features of each neuron, and the graph that joins them."""
