"""Messages, their wire form and the session table. No input or output."""
