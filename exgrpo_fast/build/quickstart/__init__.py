"""Everything the quickstart recipe needs without a download: model, tokenizer, worked solutions."""
