# shellcheck shell=bash
# Says the VM's address on the console.
address=$(ip -4 -oneline address show scope global | awk '{ print $4; exit }')
gateway=$(ip -4 route show default | awk '{ print $3; exit }')
servers=$(awk '$1 == "nameserver" { printf " %s", $2 }' /run/systemd/resolve/resolv.conf)
if [[ -z $address ]]; then
  echo "osbuilder: the VM has no network address"
else
  echo "osbuilder: address $address, gateway ${gateway:-none}, name servers${servers:- none}"
fi
