"""What people look at: progress, tables, pictures, pages; and the measurements behind them."""
