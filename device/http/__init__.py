"""The HTTP service: OpenAI's API and the chat page."""
