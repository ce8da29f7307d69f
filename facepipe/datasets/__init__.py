"""Write labelled images as the datasets that training programs read: RecordIO, WebDataset, Hugging Face's Parquet."""
