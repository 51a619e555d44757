{
  value = throw "this host needs a key";
}
