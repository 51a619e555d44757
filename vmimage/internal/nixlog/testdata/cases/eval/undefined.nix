{
  packages = [ hello ];
}
