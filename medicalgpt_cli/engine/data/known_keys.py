"""The keys that records are read by. A message may name them whatever file they stand in."""

KEYS = frozenset(
    {
        *("messages", "conversations", "conversation", "role", "content", "from", "value"),
        *("instruction", "input", "output", "history", "system", "system_prompt"),
        *("question", "query", "ask", "prompt", "answer", "response", "reference", "text", "data"),
        *("chosen", "rejected", "response_chosen", "response_rejected", "options", "id"),
    }
)
