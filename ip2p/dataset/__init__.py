"""What a datagen run leaves behind (ledger and pairs), and the ways in and out of other people's formats."""
