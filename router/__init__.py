"""The OpenAI front end, the routing decision, and the relay between prefill and decode workers."""
