// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AttributionLog} from "../src/AttributionLog.sol";
import {IAttributionLog} from "../src/interfaces/IAttributionLog.sol";
import {Base} from "./Base.sol";
import {VM} from "./Vm.sol";

contract AttributionLogTest is Base {
    uint256 private constant CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;
    bytes32 private constant ROOT1 = keccak256("root 1");
    bytes32 private constant ROOT2 = keccak256("root 2");

    AttributionLog private log = new AttributionLog();
    address private owner = person("one owner");
    address private submitter = person("one submitter");
    address private payee = person("one payee");
    address private stranger = person("stranger");

    function test_register_emits_and_keeps() public {
        bytes32 logId = log.logIdOf(initOf("one"));
        VM.expectEmit(address(log));
        emit IAttributionLog.LogRegistered(logId, owner, submitter, payee);
        assertEq(register(log, "one"), logId);
        assertEq(log.ownerOf(logId), owner);
        checkHead(logId, 0, bytes32(0), submitter);
    }

    function test_log_id_is_the_hash_of_seven_words() public view {
        IAttributionLog.LogInit memory init = initOf("one");
        bytes memory words = abi.encodePacked(
            uint256(0x0301),
            bytes32(0),
            init.originHash,
            uint256(uint160(init.signer)),
            init.checkpointKey,
            init.nonce,
            init.predecessor
        );
        assertEq(log.logIdOf(init), sha256(words));
    }

    function test_unknown_log_has_no_head() public view {
        checkHead(keccak256("nothing"), 0, bytes32(0), address(0));
        assertEq(log.ownerOf(keccak256("nothing")), address(0));
    }

    function test_register_by_a_stranger_without_the_signers_signature() public {
        IAttributionLog.LogInit memory init = initOf("one");
        bytes32 logId = log.logIdOf(init);
        bytes memory own = signed(keyOf("stranger"), registration(log, logId, stranger, stranger, stranger));
        expectRefused(init, stranger, stranger, stranger, own);
    }

    function test_register_front_run_steals_nothing() public {
        IAttributionLog.LogInit memory init = initOf("one");
        bytes32 logId = log.logIdOf(init);
        bytes memory signature = signed(keyOf("one signer"), registration(log, logId, owner, submitter, payee));
        // A stranger who saw the transaction can change none of the three, nor send it as it is.
        expectRefused(init, stranger, submitter, payee, signature);
        expectRefused(init, owner, stranger, payee, signature);
        expectRefused(init, owner, submitter, stranger, signature);
        VM.prank(owner);
        log.registerLog(init, submitter, payee, signature);
    }

    function test_register_twice() public {
        bytes32 logId = register(log, "one");
        bytes memory signature = signed(keyOf("one signer"), registration(log, logId, owner, submitter, stranger));
        VM.prank(owner);
        VM.expectRevert(abi.encodeWithSelector(IAttributionLog.LogAlreadyRegistered.selector, logId));
        log.registerLog(initOf("one"), submitter, stranger, signature);
    }

    function test_register_signature_for_another_chain_or_contract() public {
        IAttributionLog.LogInit memory init = initOf("one");
        bytes32 logId = log.logIdOf(init);
        bytes memory elsewhere =
            signed(keyOf("one signer"), registration(new AttributionLog(), logId, owner, submitter, payee));
        expectRefused(init, owner, submitter, payee, elsewhere);
        bytes memory here = signed(keyOf("one signer"), registration(log, logId, owner, submitter, payee));
        VM.chainId(block.chainid + 1);
        expectRefused(init, owner, submitter, payee, here);
    }

    function test_register_malformed_signatures() public {
        IAttributionLog.LogInit memory init = initOf("one");
        bytes32 logId = log.logIdOf(init);
        bytes32 digest = registration(log, logId, owner, submitter, payee);
        (uint8 v, bytes32 r, bytes32 s) = VM.sign(keyOf("one signer"), digest);
        bytes32 higher = bytes32(CURVE_ORDER - uint256(s));
        expectRefused(init, owner, submitter, payee, abi.encodePacked(r, higher, v == 27 ? uint8(28) : uint8(27)));
        expectRefused(init, owner, submitter, payee, abi.encodePacked(r, s, v - 27));
        expectRefused(
            init, owner, submitter, payee, abi.encodePacked(r, bytes32(uint256(s) | (uint256(v - 27) << 255)))
        );
        expectRefused(init, owner, submitter, payee, "");
        expectRefused(init, owner, submitter, payee, abi.encodePacked(r, s, v, uint8(0)));
    }

    function test_register_signer_zero_is_not_recovered_from_garbage() public {
        IAttributionLog.LogInit memory init = initOf("one");
        init.signer = address(0);
        expectRefused(init, owner, submitter, payee, abi.encodePacked(bytes32(0), bytes32(0), uint8(27)));
    }

    function test_register_without_payee() public {
        IAttributionLog.LogInit memory init = initOf("one");
        VM.prank(owner);
        VM.expectRevert(IAttributionLog.ZeroPayee.selector);
        log.registerLog(init, submitter, address(0), "");
    }

    function test_anchor_moves_the_head() public {
        bytes32 logId = register(log, "one");
        VM.expectEmit(address(log));
        emit IAttributionLog.Anchored(logId, 10, ROOT1, 0);
        anchorAs(submitter, logId, 0, bytes32(0), 10, ROOT1);
        VM.expectEmit(address(log));
        emit IAttributionLog.Anchored(logId, 11, ROOT2, 10);
        anchorAs(submitter, logId, 10, ROOT1, 11, ROOT2);
        checkHead(logId, 11, ROOT2, submitter);
    }

    function test_anchor_rolls_nothing_back() public {
        bytes32 logId = register(log, "one");
        anchorAs(submitter, logId, 0, bytes32(0), 10, ROOT1);
        anchorAs(submitter, logId, 10, ROOT1, 20, ROOT2);

        // Smaller, or the same size with another root.
        expectAnchorFails(abi.encodeWithSelector(IAttributionLog.SizeNotGrowing.selector, 20, 10));
        anchorAs(submitter, logId, 20, ROOT2, 10, ROOT1);
        expectAnchorFails(abi.encodeWithSelector(IAttributionLog.SizeNotGrowing.selector, 20, 20));
        anchorAs(submitter, logId, 20, ROOT2, 20, ROOT1);
        // From a head that was skipped, that has another root, or that has another size.
        bytes memory moved = abi.encodeWithSelector(IAttributionLog.HeadMoved.selector, logId, 20, ROOT2);
        expectAnchorFails(moved);
        anchorAs(submitter, logId, 10, ROOT1, 30, ROOT2);
        expectAnchorFails(moved);
        anchorAs(submitter, logId, 20, ROOT1, 30, ROOT2);
        expectAnchorFails(moved);
        anchorAs(submitter, logId, 21, ROOT2, 30, ROOT2);
        expectAnchorFails(moved);
        anchorAs(submitter, logId, 0, bytes32(0), 30, ROOT2);
        checkHead(logId, 20, ROOT2, submitter);
    }

    function test_anchor_twice_is_once() public {
        bytes32 logId = register(log, "one");
        anchorAs(submitter, logId, 0, bytes32(0), 10, ROOT1);
        expectAnchorFails(abi.encodeWithSelector(IAttributionLog.HeadMoved.selector, logId, 10, ROOT1));
        anchorAs(submitter, logId, 0, bytes32(0), 10, ROOT1);
    }

    function test_anchor_without_a_root() public {
        bytes32 logId = register(log, "one");
        expectAnchorFails(abi.encodeWithSelector(IAttributionLog.ZeroRoot.selector));
        anchorAs(submitter, logId, 0, bytes32(0), 10, bytes32(0));
    }

    function test_anchor_unauthorised() public {
        bytes32 logId = register(log, "one");
        expectNotSubmitter(logId, stranger);
        expectNotSubmitter(logId, owner);
        expectNotSubmitter(keccak256("nothing"), submitter);
    }

    function test_anchor_of_log_a_by_the_submitter_of_log_b() public {
        bytes32 logId = register(log, "one");
        register(log, "other");
        expectNotSubmitter(logId, person("other submitter"));
    }

    function test_anchor_after_rotation() public {
        bytes32 logId = register(log, "one");
        anchorAs(submitter, logId, 0, bytes32(0), 10, ROOT1);
        VM.expectEmit(address(log));
        emit IAttributionLog.SubmitterChanged(logId, stranger);
        VM.prank(owner);
        log.setSubmitter(logId, stranger);
        expectNotSubmitter(logId, submitter);
        anchorAs(stranger, logId, 10, ROOT1, 11, ROOT2);
        checkHead(logId, 11, ROOT2, stranger);
    }

    function test_closed_log_takes_no_anchor_until_reopened() public {
        bytes32 logId = register(log, "one");
        VM.prank(owner);
        log.setSubmitter(logId, address(0));
        expectNotSubmitter(logId, submitter);
        VM.prank(owner);
        log.setSubmitter(logId, submitter);
        anchorAs(submitter, logId, 0, bytes32(0), 10, ROOT1);
    }

    function test_set_submitter_by_another() public {
        bytes32 logId = register(log, "one");
        VM.prank(submitter);
        VM.expectRevert(abi.encodeWithSelector(IAttributionLog.NotLogOwner.selector, logId, submitter));
        log.setSubmitter(logId, submitter);
        VM.prank(stranger);
        VM.expectRevert(abi.encodeWithSelector(IAttributionLog.NotLogOwner.selector, keccak256("no"), stranger));
        log.setSubmitter(keccak256("no"), stranger);
    }

    function testFuzz_only_a_larger_size_over_the_exact_head(
        uint64 size,
        bytes32 root,
        uint64 previousSize,
        bytes32 previousRoot,
        uint64 next
    ) public {
        VM.assume(size > 0 && root != bytes32(0));
        bytes32 logId = register(log, "one");
        anchorAs(submitter, logId, 0, bytes32(0), size, root);
        bool exact = previousSize == size && previousRoot == root;
        VM.prank(submitter);
        try log.anchor(logId, previousSize, previousRoot, next, ROOT2) {
            assertTrue(exact && next > size);
        } catch {
            assertTrue(!exact || next <= size);
        }
        VM.prank(submitter);
        try log.anchor(logId, size, root, next, ROOT2) {
            assertTrue(next > size);
        } catch {
            assertTrue(next <= size || exact);
        }
    }

    function anchorAs(address sender, bytes32 logId, uint64 previous, bytes32 previousRoot, uint64 size, bytes32 root)
        private
    {
        VM.prank(sender);
        log.anchor(logId, previous, previousRoot, size, root);
    }

    function expectAnchorFails(bytes memory reason) private {
        VM.expectRevert(reason);
    }

    function expectNotSubmitter(bytes32 logId, address sender) private {
        (uint64 size, bytes32 root,) = log.headOf(logId);
        VM.expectRevert(abi.encodeWithSelector(IAttributionLog.NotSubmitter.selector, logId, sender));
        anchorAs(sender, logId, size, root, size + 1, ROOT2);
    }

    function expectRefused(
        IAttributionLog.LogInit memory init,
        address sender,
        address submitter_,
        address payee_,
        bytes memory signature
    ) private {
        VM.prank(sender);
        VM.expectRevert(IAttributionLog.InvalidRegistrationSignature.selector);
        log.registerLog(init, submitter_, payee_, signature);
    }

    function checkHead(bytes32 logId, uint64 size, bytes32 root, address submitter_) private view {
        (uint64 gotSize, bytes32 gotRoot, address gotSubmitter) = log.headOf(logId);
        assertEq(gotSize, size);
        assertEq(gotRoot, root);
        assertEq(gotSubmitter, submitter_);
    }
}
