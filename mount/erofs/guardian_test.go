package erofs

const victimEnv = "EROFS_TEST_VICTIM"

func victim() {}
