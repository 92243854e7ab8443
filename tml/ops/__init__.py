"""Pure array functions: one public function, one reference, back-ends chosen by an enum."""
