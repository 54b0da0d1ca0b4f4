package tree

const (
	vectorLayer   = "28d220a2e602e11d714e9c1aa1d7e040ab09c9194dcaf9a4c3979bf7daed4db4"
	vectorPayload = "adf7097b871c6e6f8f96aa6a03ce8184d10d8d2717a80f7dfb373849a182c121"
)
