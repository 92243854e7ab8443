"""The tools of the tool server, each a plain function or class that knows nothing of how it is called."""
