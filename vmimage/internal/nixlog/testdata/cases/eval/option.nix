{
  networking.hostName = 5;
}
