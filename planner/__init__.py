"""Who is in the cluster and what they do: the registry, and the planner's decisions."""
