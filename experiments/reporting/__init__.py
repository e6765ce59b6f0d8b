"""What people look at: figures, tables, transcripts, pages."""
