"""What the parameter server decides: batch sizes and participants. numpy only."""
