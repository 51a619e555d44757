{
  services.opensssh.enable = true;
}
