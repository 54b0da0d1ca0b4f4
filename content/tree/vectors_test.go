package tree

const (
	vectorLayer   = "80d12422e407a59ca7b129f06e7d17ab725183f02a5bb4a0dc2956900add5cdc"
	vectorPayload = "b3b572915b5407572a46ccd149ad425e49684701ac70f7f85db2ed8129d8b426"
)
