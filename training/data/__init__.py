"""One task a file; `chat` encodes them, `pools` writes them as tokens, `batches` draws rows."""
